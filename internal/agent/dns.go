package agent

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"time"
)

const (
	// resolvConf is where the pod's resolvers are, as the kubelet has set them from dnsPolicy and dnsConfig.
	resolvConf = "/etc/resolv.conf"
	// dnsTimeout bounds a question to one of them.
	dnsTimeout = 500 * time.Millisecond
	// minDNS is the length of a DNS message's header (RFC 1035, section 4.1.1), and truncated its bit TC.
	minDNS    = 12
	truncated = 0x02
)

// resolve asks the pod's own resolvers for a laptop: the message goes there and comes back as it is.
func (u *uplink) resolve(ctx context.Context, msg []byte) ([]byte, error) {
	if len(msg) < minDNS {
		return nil, errors.New("not a DNS message")
	}
	servers, err := nameservers(u.cfg.ResolvConf)
	if err != nil {
		return nil, err
	}
	errs := []error{errors.New("no resolver of the pod answers")}
	for _, s := range servers {
		a, err := askUDP(ctx, s, msg)
		if err == nil && a[2]&truncated != 0 {
			a, err = askTCP(ctx, s, msg)
		}
		if err == nil {
			return a, nil
		}
		errs = append(errs, err)
	}
	return nil, errors.Join(errs...)
}

// nameservers reads the resolvers of a resolv.conf(5).
func nameservers(file string) ([]string, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var out []string
	sc := bufio.NewScanner(f)
	for sc.Scan() {
		if w := strings.Fields(sc.Text()); len(w) > 1 && w[0] == "nameserver" {
			server := w[1]
			if _, _, err := net.SplitHostPort(server); err != nil {
				server = net.JoinHostPort(server, "53")
			}
			out = append(out, server)
		}
	}
	return out, sc.Err()
}

func askUDP(ctx context.Context, server string, msg []byte) ([]byte, error) {
	c, err := dialDNS(ctx, "udp", server)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	if _, err := c.Write(msg); err != nil {
		return nil, err
	}
	buf := make([]byte, 65535)
	for {
		n, err := c.Read(buf)
		if err != nil {
			return nil, err
		}
		if n >= minDNS && buf[0] == msg[0] && buf[1] == msg[1] { // an answer to another question is none
			return buf[:n], nil
		}
	}
}

func askTCP(ctx context.Context, server string, msg []byte) ([]byte, error) {
	c, err := dialDNS(ctx, "tcp", server)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	if _, err := c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(msg))), msg...)); err != nil { // RFC 1035, section 4.2.2
		return nil, err
	}
	var length [2]byte
	if _, err := io.ReadFull(c, length[:]); err != nil {
		return nil, err
	}
	a := make([]byte, binary.BigEndian.Uint16(length[:]))
	if _, err := io.ReadFull(c, a); err != nil {
		return nil, err
	}
	if len(a) < minDNS {
		return nil, fmt.Errorf("%s answers with %d bytes", server, len(a))
	}
	return a, nil
}

func dialDNS(ctx context.Context, network, server string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dnsTimeout)
	defer cancel()
	var d net.Dialer
	c, err := d.DialContext(ctx, network, server)
	if err != nil {
		return nil, err
	}
	return c, c.SetDeadline(time.Now().Add(dnsTimeout))
}
