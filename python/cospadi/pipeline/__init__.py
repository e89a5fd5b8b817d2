"""The main job: recipe, plan, fits, checkpoint."""
