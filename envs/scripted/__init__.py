"""Scripted solutions, one small generator per task; `envs.oracle` is the way in."""
