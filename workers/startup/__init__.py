"""The account of a start: what took how long, what was fetched, what was found or missed, and what that saved."""
