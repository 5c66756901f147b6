"""What makes the numbers of this project: the runner, records and figures, papers and studies."""
