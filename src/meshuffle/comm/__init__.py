"""Process groups, launching, devices and collectives.

Nothing is imported here, so that `meshuffle.comm.launch` (which the command line needs
before any rank exists) does not bring torch with it.
"""
