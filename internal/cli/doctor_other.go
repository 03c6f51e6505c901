//go:build !linux

package cli

import "context"

func checkMachine(_ context.Context, c *checkup) {
	c.add("machine", checkSkip, "nothing is looked at on this system yet", "")
}

func checkLookup(context.Context, *checkup) {}
