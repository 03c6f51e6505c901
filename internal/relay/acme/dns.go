package acme

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"time"

	"github.com/libdns/libdns"
	"github.com/miekg/dns"
)

// How long a DNS server and a program may take, and how long resolvers may keep a record.
const (
	updateTimeout  = 20 * time.Second
	programTimeout = 2 * time.Minute
	recordTTL      = 60 // s
)

// updater sets records by dynamic updates (RFC 2136), which it signs (TSIG, RFC 8945).
type updater struct {
	server string
	key    *tsigKey // nil: unsigned
}

type tsigKey struct{ name, algorithm, secret string }

func newUpdater(server, keyFile string) (*updater, error) {
	u := &updater{server: server}
	if keyFile == "" {
		return u, nil
	}
	b, err := os.ReadFile(keyFile)
	if err != nil {
		return nil, fmt.Errorf("TSIG key: %w", err)
	}
	if u.key, err = readKey(string(b)); err != nil {
		return nil, fmt.Errorf("TSIG key %s: %w", keyFile, err)
	}
	return u, nil
}

// What is read of a key's file, of which all BIND's programs write the same: key "NAME" { algorithm ALGORITHM; secret "BASE64"; };
var (
	keyName      = regexp.MustCompile(`(?s)\bkey\s+"?([^\s"{]+)"?\s*\{`)
	keyAlgorithm = regexp.MustCompile(`(?s)\balgorithm\s+"?([^\s";]+)"?\s*;`)
	keySecret    = regexp.MustCompile(`(?s)\bsecret\s+"?([^\s";]+)"?\s*;`)
)

// readKey reads a key; what is wrong with one is told without it.
func readKey(text string) (*tsigKey, error) {
	name, algorithm, secret := keyName.FindStringSubmatch(text), keyAlgorithm.FindStringSubmatch(text), keySecret.FindStringSubmatch(text)
	if name == nil || algorithm == nil || secret == nil {
		return nil, errors.New(`want key "NAME" { algorithm hmac-sha256; secret "..."; };, as tsig-keygen writes it`)
	}
	k := &tsigKey{dns.CanonicalName(name[1]), dns.CanonicalName(algorithm[1]), secret[1]}
	switch k.algorithm {
	case dns.HmacSHA1, dns.HmacSHA224, dns.HmacSHA256, dns.HmacSHA384, dns.HmacSHA512:
	default:
		return nil, fmt.Errorf("algorithm %s: want hmac-sha256 or another hmac-sha", algorithm[1])
	}
	if _, err := base64.StdEncoding.DecodeString(k.secret); err != nil {
		return nil, errors.New("the secret is not base64")
	}
	return k, nil
}

// AppendRecords sets records, beside others of the same name.
func (u *updater) AppendRecords(ctx context.Context, zone string, recs []libdns.Record) ([]libdns.Record, error) {
	return recs, u.update(ctx, zone, recs, (*dns.Msg).Insert)
}

// DeleteRecords removes these records, and no others of the same name.
func (u *updater) DeleteRecords(ctx context.Context, zone string, recs []libdns.Record) ([]libdns.Record, error) {
	return recs, u.update(ctx, zone, recs, (*dns.Msg).Remove)
}

func (u *updater) update(ctx context.Context, zone string, recs []libdns.Record, add func(*dns.Msg, []dns.RR)) error {
	m := new(dns.Msg)
	m.SetUpdate(dns.Fqdn(zone))
	for _, rec := range recs {
		name, value := record(zone, rec)
		add(m, []dns.RR{&dns.TXT{Hdr: dns.RR_Header{Name: name, Rrtype: dns.TypeTXT, Class: dns.ClassINET, Ttl: recordTTL}, Txt: []string{value}}})
	}
	c := dns.Client{Net: "tcp", Timeout: updateTimeout}
	if u.key != nil {
		m.SetTsig(u.key.name, u.key.algorithm, 300, time.Now().Unix())
		c.TsigSecret = map[string]string{u.key.name: u.key.secret}
	}
	answer, _, err := c.ExchangeContext(ctx, m, u.server)
	if err != nil {
		return fmt.Errorf("DNS server %s: update of zone %s: %w", u.server, zone, err)
	}
	if answer.Rcode != dns.RcodeSuccess {
		return fmt.Errorf("DNS server %s refuses to update zone %s (%s): does it take updates of TXT records with this key?", u.server, zone, dns.RcodeToString[answer.Rcode])
	}
	return nil
}

// record is the full name and the value of a record.
func record(zone string, rec libdns.Record) (name, value string) {
	rr := rec.RR()
	return dns.Fqdn(libdns.AbsoluteName(rr.Name, zone)), rr.Data
}

// program has a program set and remove records, with the arguments "present" or "cleanup", name and value: those that lego's exec provider gives, for
// which there are programs.
type program struct{ path string }

func newProgram(path string) (*program, error) {
	full, err := exec.LookPath(path)
	if err != nil {
		return nil, fmt.Errorf("program for DNS records: %w", err)
	}
	return &program{full}, nil
}

// AppendRecords sets records.
func (p *program) AppendRecords(ctx context.Context, zone string, recs []libdns.Record) ([]libdns.Record, error) {
	return recs, p.run(ctx, "present", zone, recs)
}

// DeleteRecords removes them.
func (p *program) DeleteRecords(ctx context.Context, zone string, recs []libdns.Record) ([]libdns.Record, error) {
	return recs, p.run(ctx, "cleanup", zone, recs)
}

func (p *program) run(ctx context.Context, what, zone string, recs []libdns.Record) error {
	ctx, cancel := context.WithTimeout(ctx, programTimeout)
	defer cancel()
	for _, rec := range recs {
		name, value := record(zone, rec)
		cmd := exec.CommandContext(ctx, p.path, what, name, value) //nolint:gosec // the one that whoever runs the relay has named
		cmd.WaitDelay = time.Second
		for _, v := range os.Environ() {
			if !strings.HasPrefix(v, "DOPPEL_RELAY_") { // the relay's own secrets
				cmd.Env = append(cmd.Env, v)
			}
		}
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%s %s %s: %w: %s", p.path, what, name, err, lastLine(string(out)))
		}
	}
	return nil
}

// lastLine is what a program that has failed said last.
func lastLine(out string) string {
	out = strings.TrimSpace(out)
	out = out[strings.LastIndexByte(out, '\n')+1:]
	return out[:min(len(out), 200)]
}
