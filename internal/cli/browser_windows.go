package cli

import (
	"context"
	"os/exec"
)

// openBrowser opens a page in the user's browser.
func openBrowser(ctx context.Context, page string) error {
	return exec.CommandContext(ctx, "rundll32", "url.dll,FileProtocolHandler", page).Run()
}
