"""What you type: each job parses, prints the resolved configuration, calls one function and leaves with its code."""
