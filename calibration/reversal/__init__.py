"""Post-training detection: which class is a backdoor's target, and with which pattern."""
