"""The one exception that a user's mistake raises."""


class UserError(Exception):
  """A mistake that the user can mend.

  The message is one line: what was expected, what came (with the file's
  name), and what to do. `main` prints it without a traceback; library users
  may catch it.
  """
