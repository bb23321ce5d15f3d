"""Two commits, measured on one machine in turns: what became faster or slower, and whether that is more than noise.

`make bench-compare BASE=<commit>` checks BASE out into a temporary worktree, builds its libraries there (those of this
tree serve where the C++ and CUDA sources are the same), and starts a process for each commit and one more for BASE.
They take turns, and a ratio counts as a change only if it is beyond what the two processes of BASE differ by.
"""
