"""Our experiments, one file a study."""
