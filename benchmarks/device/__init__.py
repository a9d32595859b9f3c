"""What benchmarks/device_run.py runs on a GPU, a stage in a process of its own."""
