"""Projects that live through an outage: ``make example NAME=django`` or ``NAME=fastapi`` starts one."""
