"""Where jobs really run: Ray, the processes of a trial, evaluators; the only importers of ray are two files here."""
