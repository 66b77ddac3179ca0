"""A job: its folder, its settings, its stages, and what is done with it when it is finished."""
