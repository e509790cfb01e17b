"""The dry run: each rank's own step on the meta device, counted; then time, memory and the choice of shares."""
