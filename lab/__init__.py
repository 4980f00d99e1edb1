"""What you do not need tonight: the experiments, the analyses and the tables of the paper."""
