"""Negative log-likelihood: which terms of the bound are looked at, what they are, and how sure their mean is."""
