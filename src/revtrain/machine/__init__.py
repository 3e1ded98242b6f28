"""The machine a run uses: devices, processes, signals, files."""
