"""What a study will take before anything starts: costs, what cannot fit, the schedule and its picture."""
