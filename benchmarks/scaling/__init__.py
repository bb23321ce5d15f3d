"""Scale on paper: what a step on one GPU becomes on many, by DistributedDataParallel; docs/scaling.md explains it."""
