"""The table of instances and what concerns all of them: recovery, observation, exec sessions."""
