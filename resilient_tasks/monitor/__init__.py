"""What happened and what is: events of breakers and tasks, and what dashboards make of them."""
