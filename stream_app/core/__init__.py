"""The meaning of the service, pure: profile and event in, new profile and transitions out.

In the order in which an event meets them: `event` (the facts), `decay` (the arithmetic), `profile` (all state
of one user), `segment` (the definitions), `fold` (one event), `step` (a slice of a partition). Nothing here
reads a clock, a file, the network or the environment: instants arrive as arguments.
"""
