"""What is worked with beside the models; needs the package installed and never travels with a checkpoint."""
