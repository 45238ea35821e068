"""What runs next and where: jobs, the scheduler, the driver's loop, and a simulated cluster for both."""
