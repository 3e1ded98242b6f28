"""What a run will need, known before it starts: the prediction of a step, and the plan."""
