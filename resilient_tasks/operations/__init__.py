"""What operators do by hand: waiting and dead-lettered tasks, and the doctor."""
