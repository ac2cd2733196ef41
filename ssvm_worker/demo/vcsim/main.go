// Command vcsim is the vCenter that the tests and the demo talk to: govmomi's simulator over TLS, with what it lacks for
// an export (CreateDescriptor, thumbprints, leases that expire), and with faults that are switched while it runs.
//
// It prints one JSON line: its URL, and the PEM of its certificate.
package main

import (
	"crypto/tls"
	"encoding/json"
	"encoding/pem"
	"flag"
	"fmt"
	"io"
	"log"
	"net/url"
	"os"
	"strings"

	"github.com/vmware/govmomi/simulator"
)

// The newest API that pyVmomi 9.1 knows; with an older one pyVmomi itself refuses the newer members.
const apiVersion = "8.0.3.0"

func main() {
	listen := flag.String("listen", "127.0.0.1:0", "address to listen on")
	names := flag.String("names", "localhost,127.0.0.1", "names and addresses for a certificate of its own making")
	certificate := flag.String("cert", "", "PEM file of a certificate, in place of that one")
	key := flag.String("key", "", "PEM file of its private key")
	username := flag.String("username", "administrator@vsphere.local", "the one user; $VCSIM_PASSWORD is the password")
	esx := flag.Bool("esx", false, "be a standalone ESXi host")
	descriptor := flag.Bool("descriptor", true, "have OvfManager.CreateDescriptor")
	child := flag.Bool("child", false, "end when standard input does, that is, with the parent")
	verbose := flag.Bool("verbose", false, "let the simulator log")
	flag.Parse()
	if !*verbose {
		log.SetOutput(io.Discard)
	}

	pair := identity(*certificate, *key, strings.Split(*names, ","))
	model, product := simulator.VPX(), "VMware vCenter Server"
	if *esx {
		model, product = simulator.ESX(), "VMware ESXi"
	}
	about := &model.ServiceContent.About
	about.ApiVersion, about.Version = apiVersion, apiVersion
	about.FullName = fmt.Sprintf("%s %s (simulated)", product, apiVersion)
	must(model.Create())
	model.Service.TLS = &tls.Config{Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12}
	model.Service.Listen = &url.URL{Host: *listen, User: url.UserPassword(*username, os.Getenv("VCSIM_PASSWORD"))}
	world := newWorld(model.Service, thumbprint(pair.Certificate[0]))
	if *descriptor {
		world.addDescriptor()
	}
	server := model.Service.NewServer()
	world.address = server.URL.Host
	world.nameHosts(faults{})
	// Nobody knows the URL yet, so no request sees the change.
	server.Config.Handler = world.handler(server.Config.Handler)
	must(json.NewEncoder(os.Stdout).Encode(map[string]string{
		"url":         "https://" + server.URL.Host,
		"certificate": string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: pair.Certificate[0]})),
	}))
	if !*child {
		select {}
	}
	_, _ = io.Copy(io.Discard, os.Stdin)
	model.Remove()
}

func must(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
