"""The whole system as processes: driver, scheduler, agent, real instances; some of them get killed."""
