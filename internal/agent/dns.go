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
	"slices"
	"strings"
	"time"
)

const (
	// resolvConf is where the pod's resolvers are, as the kubelet has set them from dnsPolicy and dnsConfig.
	resolvConf = "/etc/resolv.conf"
	// dnsTimeout bounds a question to all of them: less than the manager waits (agentDNSTimeout there).
	dnsTimeout = 900 * time.Millisecond
	// dnsStagger is how long one has before the next is asked, too.
	dnsStagger = 300 * time.Millisecond
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
	return askServers(ctx, servers, msg, dnsTimeout, dnsStagger)
}

// askServers asks one after the other, the next after a while or when one before has failed. An answer counts whoever gives it; that there is nothing
// counts once those before have failed, or at the end, as it does for the laptop's own resolvers (resolver.race).
func askServers(ctx context.Context, servers []string, msg []byte, timeout, after time.Duration) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel() // ends the losers
	type result struct {
		place  int
		answer []byte
		err    error
	}
	results := make(chan result, len(servers))
	asked, pending := 0, 0
	next := func() {
		if asked < len(servers) {
			place := asked
			go func() {
				a, err := ask(ctx, servers[place], msg)
				results <- result{place, a, err}
			}()
			asked++
			pending++
		}
	}
	next()
	stagger := time.NewTicker(after)
	defer stagger.Stop()
	var (
		settled = make([]bool, len(servers)) // have answered or failed
		nothing *result                      // says that there is nothing; of the first that does
		refusal []byte                       // for the laptop if nobody knows better
		errs    = []error{errors.New("no resolver of the pod answers")}
	)
	for pending > 0 && ctx.Err() == nil {
		select {
		case r := <-results:
			pending--
			settled[r.place] = true
			switch {
			case r.err != nil:
				errs = append(errs, r.err)
			case unhelpful(r.answer):
				if refusal == nil {
					refusal = r.answer
				}
			case !negative(r.answer):
				return r.answer, nil
			case nothing == nil || r.place < nothing.place:
				nothing = &r
			}
			if nothing == nil {
				next()
				stagger.Reset(after)
			} else if !slices.Contains(settled[:nothing.place], false) {
				return nothing.answer, nil
			}
		case <-stagger.C:
			if nothing == nil {
				next()
			}
		case <-ctx.Done():
		}
	}
	switch {
	case nothing != nil:
		return nothing.answer, nil
	case refusal != nil:
		return refusal, nil
	}
	return nil, errors.Join(append(errs, ctx.Err())...)
}

// unhelpful names the codes on which the pod's own resolver library goes on to its next server: SERVFAIL, NOTIMP and REFUSED (res_send in glibc).
func unhelpful(answer []byte) bool {
	rcode := answer[3] & 0xf
	return rcode == 2 || rcode == 4 || rcode == 5
}

// negative says whether an answer is that there is no such name, or nothing of this type.
func negative(answer []byte) bool {
	return answer[3]&0xf == 3 || answer[3]&0xf == 0 && binary.BigEndian.Uint16(answer[6:]) == 0
}

func ask(ctx context.Context, server string, msg []byte) ([]byte, error) {
	a, err := askUDP(ctx, server, msg)
	if err == nil && a[2]&truncated != 0 {
		a, err = askTCP(ctx, server, msg)
	}
	return a, err
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
	var d net.Dialer
	c, err := d.DialContext(ctx, "udp", server)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { _ = c.Close() })()
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
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", server)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { _ = c.Close() })()
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
