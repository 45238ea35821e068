"""How far a fit can be trusted: runs drawn again, and what their fits say together."""
