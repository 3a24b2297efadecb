"""Long work on top of block: job states, pause points, speed; backup."""
