"""The workstation's side: inspect a classifier, calibrate its guards, write the bundle, measure the result."""
