// Package rootd owns doppel-rootd, the privileged program: it creates the TUN device and sets addresses, routes and DNS for one user daemon at a time.
package rootd

import (
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"time"

	"github.com/doppel-dev/doppel/internal/rootapi"
	"github.com/doppel-dev/doppel/internal/xlog"
)

// Group is whose members may use a doppel-rootd that runs as a service.
const Group = "doppel"

// NoUID is a Config.UID that allows nobody but root.
const NoUID = -1

// Config says who may use rootd and where. Zero values mean their defaults, but for UID.
type Config struct {
	// Socket is the path to listen on; default rootapi.DefaultSocket. Its directory is created when missing, and refused when others
	// than root could replace what is in it.
	Socket string
	// UID is the one user, besides root, who may connect; NoUID for none.
	UID int
	// Service lets the members of Group connect.
	Service bool
	// ResolvConf is where the laptop's resolvers stand; default /etc/resolv.conf.
	ResolvConf string
	// PingEvery is how often the owner of the network is asked whether it lives, default 500 ms; without an answer for PingTimeout,
	// default 1.5 s, its DNS capture is taken away until it answers.
	PingEvery, PingTimeout time.Duration
	// Log; default: none.
	Log *slog.Logger
	// Level is Log's, to be changed on request; nil: it cannot be.
	Level *xlog.Level

	probe func(table string) error // whether nftables can be used; osdns.Probe but in tests
}

func (c Config) withDefaults() (Config, error) {
	var errs []error
	if c.Socket == "" {
		c.Socket = rootapi.DefaultSocket
	}
	if !filepath.IsAbs(c.Socket) {
		errs = append(errs, fmt.Errorf("socket %q: want an absolute path", c.Socket))
	}
	if c.UID < NoUID {
		errs = append(errs, fmt.Errorf("uid %d: want 0 or more", c.UID))
	}
	if c.ResolvConf == "" {
		c.ResolvConf = "/etc/resolv.conf"
	}
	if c.PingEvery < 0 || c.PingTimeout < 0 {
		errs = append(errs, errors.New("negative ping times"))
	}
	if c.PingEvery == 0 {
		c.PingEvery = 500 * time.Millisecond
	}
	if c.PingTimeout == 0 {
		c.PingTimeout = 1500 * time.Millisecond
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c, errors.Join(errs...)
}
