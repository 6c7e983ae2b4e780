"""The Plan: what is split over which mesh axis. The search comes with a later issue."""
