"""Operations with the values and gradients of torch's own that keep less memory for the backward pass."""
