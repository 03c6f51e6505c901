package tundev

import (
	"fmt"
	"os"

	"golang.zx2c4.com/wireguard/tun"

	"github.com/doppel-dev/doppel/internal/uerr"
)

var errNoDescriptor = uerr.New(uerr.Internal, "use doppel in a Linux virtual machine (WSL 2)", "a Windows network adapter cannot be passed to another process")

// Open cannot be: a Wintun adapter is no descriptor, the process that creates it moves its packets. See Create.
func Open(string, int, uint32) (*os.File, string, error) { return nil, "", errNoDescriptor }

// New cannot be; see Open.
func New(*os.File) (*Device, error) { return nil, errNoDescriptor }

// Create creates a Wintun adapter that lives as long as this process. mtu 0 means DefaultMTU. It needs an administrator and wintun.dll
// beside the program.
func Create(name string, mtu int) (*Device, error) {
	if mtu == 0 {
		mtu = DefaultMTU
	}
	t, err := tun.CreateTUN(name, mtu)
	if err != nil {
		return nil, fmt.Errorf("create adapter %s (is wintun.dll beside the program?): %w", name, err)
	}
	return newDevice(t), nil
}
