"""The Plan: what is split over which mesh axis; its costs, pipeline cuts and schedules."""
