"""The commands: revtrain, revtrain-report, revtrain-eval, revtrain-export."""
