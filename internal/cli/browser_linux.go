package cli

import (
	"context"
	"errors"
	"os"
	"os/exec"
)

// openBrowser opens a page in the user's browser.
func openBrowser(ctx context.Context, page string) error {
	if os.Getenv("DISPLAY") == "" && os.Getenv("WAYLAND_DISPLAY") == "" {
		return errors.New("there is no display")
	}
	return exec.CommandContext(ctx, "xdg-open", page).Run()
}
