"""Real services for tests: hosts with networks of their own and sshd, Slurm. They need root and Debian's packages."""
