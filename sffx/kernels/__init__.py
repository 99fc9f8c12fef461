"""Operations with the values and gradients of torch's own, which keep less memory."""
