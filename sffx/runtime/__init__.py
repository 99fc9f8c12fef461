"""Run and train a cut model, stage by stage."""
