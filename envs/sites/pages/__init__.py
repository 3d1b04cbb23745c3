"""Scripts and fragments that the served pages of `envs.sites` get."""
