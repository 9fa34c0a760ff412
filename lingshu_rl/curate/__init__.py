"""From raw sets to training rows: `lingshu-rl curate PIPELINE.yaml`, and the leak check of the evaluation kit."""
