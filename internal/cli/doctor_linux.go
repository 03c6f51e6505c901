package cli

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// checkMachine looks at what the kernel has to offer.
func checkMachine(_ context.Context, c *checkup) {
	st, err := os.Stat("/dev/net/tun")
	switch {
	case err != nil:
		c.add("TUN device", checkFail, "/dev/net/tun: "+errors.Unwrap(err).Error(), "load it with: sudo modprobe tun (in a container: --device /dev/net/tun)")
	case st.Mode()&os.ModeCharDevice == 0:
		c.add("TUN device", checkFail, "/dev/net/tun is no device", "make it with: sudo mknod /dev/net/tun c 10 200")
	default:
		c.add("TUN device", checkOK, "/dev/net/tun is there", "")
	}
	// Opening the socket needs no privilege; it fails only where the kernel has no netfilter at all.
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		c.add("nftables", checkWarn, fmt.Sprintf("the kernel has no nfnetlink: %v", err), "load it with: sudo modprobe nf_tables; DNS is captured by it where there is no systemd-resolved")
	} else {
		_ = unix.Close(fd)
		c.add("nftables", checkOK, "the kernel has nfnetlink", "")
	}
	b, err := os.ReadFile("/etc/resolv.conf")
	n := 0
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == "nameserver" {
			n++
		}
	}
	switch {
	case err != nil:
		c.add("resolvers", checkWarn, err.Error(), "names of the cluster resolve only if programs ask a resolver")
	case n == 0:
		c.add("resolvers", checkWarn, "/etc/resolv.conf names no resolver", "names of the cluster resolve only if programs ask one")
	default:
		c.add("resolvers", checkOK, fmt.Sprintf("/etc/resolv.conf names %d", n), "")
	}
}

// lookupTimeout bounds the lookup of a name of the cluster.
const lookupTimeout = 5 * time.Second

// checkLookup asks as any program does for a name that every cluster has; that it is out of reach or there is one is all the same here.
func checkLookup(ctx context.Context, c *checkup) {
	ctx, cancel := context.WithTimeout(ctx, lookupTimeout)
	defer cancel()
	start := time.Now()
	addrs, err := net.DefaultResolver.LookupHost(ctx, "kubernetes.default.svc")
	var de *net.DNSError
	switch {
	case err == nil:
		c.add("lookup", checkOK, fmt.Sprintf("kubernetes.default.svc is %s, in %d ms", strings.Join(addrs, ", "), time.Since(start).Milliseconds()), "")
	case errors.As(err, &de) && de.IsNotFound:
		c.add("lookup", checkOK, fmt.Sprintf("names of the cluster are answered, in %d ms; kubernetes.default.svc is out of your reach", time.Since(start).Milliseconds()), "")
	default:
		c.add("lookup", checkFail, "kubernetes.default.svc: "+oneLine(err.Error()), "is another program answering DNS on this machine? See /etc/resolv.conf and: doppel status")
	}
}
