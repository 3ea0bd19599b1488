"""`conntrackd doctor`: looks at the machine for what keeps conntrackd from its work, and says what to do.

It only looks. What the kernel makes of our rules is tried in a network namespace that ends with the trial.
"""
