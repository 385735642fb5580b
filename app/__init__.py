"""What people run: preparation, training, evaluation, inference, export and serving."""
