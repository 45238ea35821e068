"""A study: trials over a ladder of sizes, their evaluations, the law, on Ray."""
