"""The command line of dcnseg."""
