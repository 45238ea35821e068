"""Moving averages of the weights: their rules, how they are kept, and how others are made of them after training."""
